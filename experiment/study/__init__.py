"""Studies: arms × seeds × values of recipe keys, with everything shared that can be shared."""
