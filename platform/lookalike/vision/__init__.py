"""From images to embeddings: decoding, transforms, backbones and the encoder. The only package that imports timm."""
