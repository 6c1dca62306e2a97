"""The visual dictionary: images sampled per term, concreteness, its boundary. Plain functions, no Ray."""
