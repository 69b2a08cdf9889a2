"""Images that pipelines draw, are given and score, and of which run they are."""
