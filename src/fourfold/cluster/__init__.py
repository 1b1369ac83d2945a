"""Workers: started here, or joining over the network."""
