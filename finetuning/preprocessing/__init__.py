"""From a data file to tokens and labels."""
