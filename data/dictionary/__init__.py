"""The visual dictionary: samples of images per term, concreteness, its boundary. Plain functions, no Ray."""
