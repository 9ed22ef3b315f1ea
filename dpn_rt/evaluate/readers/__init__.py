"""Files of questions and annotations -> rows."""
