"""Label files of other formats, read as objects in pictures; ``tools.convert_annotations`` makes COCO files of them."""
