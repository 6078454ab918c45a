"""The measurements of `fastentropy bench`: cases -> measurements -> a record, its table, its plot, its comparison."""
