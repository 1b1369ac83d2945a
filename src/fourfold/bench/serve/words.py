"""Common short English words, nearly all of them one token of a usual vocabulary."""

_LIST = """
able about after again air also always animal answer around ask away back because before
begin best better between big black blue book both boy bring build call came car carry change
children city clear close cold come could country cut dark day deep different door down draw
early earth east eat end enough even ever every example eye face fall family far farm father
feel few field find fine fire first fish five follow food form four free friend from front
full game gave girl give gold good great green ground group grow half hand hard head hear
heart help here high hold home horse hot hour house idea just keep kind know land large last
late laugh lead learn leave left letter life light line list little live long look love low
machine main make many map mark mean measure might mind money month moon more morning most
mother mountain move much music name near need never new next night north note number ocean
often old once open order other over page paper part people picture place plain plan plant
play point power press problem quick rain read ready real red rest right river road rock room
round rule run same school science sea second seem sentence set several ship short show side
simple sing size sleep slow small snow song soon sound south space stand star start state
stay step still stop story street strong study summer sun sure table take talk teach tell
test thing think thought thousand three time together town travel tree true turn under until
use very voice walk want war warm watch water week west wheel while white whole wind winter
wood word work world year young
"""

WORDS = tuple(_LIST.split())
