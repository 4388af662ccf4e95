"""What a selection is made of, told from the files of a run: nothing here trains, scores or imports torch."""
