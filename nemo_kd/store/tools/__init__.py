"""Operations on finished stores: verify, measure, convert, merge, split and average."""
