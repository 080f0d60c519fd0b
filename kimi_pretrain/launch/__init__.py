"""Starting the ranks of a run, here or on a cluster; knows the configuration, not the training."""
