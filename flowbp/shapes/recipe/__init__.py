"""How the `shapes` model was made: nothing of this runs when it is used. `stages` has the command."""
