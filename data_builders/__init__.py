"""From dental annotation files to grounded datasets. Light: importing this loads no deep-learning library."""
