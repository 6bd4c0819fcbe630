"""Price models on word counts: cheap, strong on small catalogues, and the yardstick for every encoder."""
