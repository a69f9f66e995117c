"""Data packaged with the project: `facts.json`, facts in the schema of KnowEdit."""
