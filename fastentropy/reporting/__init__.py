"""HTML pages and plots of pruning runs, and the plot of entropies."""
