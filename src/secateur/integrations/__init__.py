"""One module for each library whose networks secateur takes, prunes and hands back."""
