"""Who is who: the federation's authority, tokens that let a site in, and the identity each process shows."""
