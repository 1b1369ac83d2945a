"""The sparsity law: what loss a model of so many parameters, so sparse, reaches on so many tokens.

`grid` says which models are trained, `sweep` trains them one after the other and leaves `records`;
`checks` says what these do that no law does; `fitting` finds the coefficients of the `forms` by the
solver of `solve`, with intervals and with runs held out; `leverage` says how many times larger a
dense model must be for the same loss; `plots` draws all that; `advise` turns it into the sparsity
for a budget.
"""
