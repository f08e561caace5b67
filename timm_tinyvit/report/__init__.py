"""Reports on stores and runs: statistics, pictures, plots and HTML pages."""
