"""How the site is made; ``plugin`` alone knows MkDocs."""
