"""From messy text to scored terms: languages, word lists, vocabulary, annotators. Plain functions, no Ray."""
