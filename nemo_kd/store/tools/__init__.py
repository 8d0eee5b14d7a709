"""Work on finished stores: measure, convert, merge, split and average them."""
