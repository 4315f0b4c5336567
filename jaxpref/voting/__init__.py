"""People vote on pairs of pictures in a browser: which pair is next, the votes on disk, the page, and what they say."""
