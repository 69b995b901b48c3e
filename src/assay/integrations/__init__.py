"""Other frameworks' own ways to train and evaluate, one file a framework; import the one that you use."""
