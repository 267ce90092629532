"""The seeded generator of everything the embedded model is trained and tested on: one file for each family of tasks."""
