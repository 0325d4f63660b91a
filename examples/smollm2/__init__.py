"""A real pretrained language model as the teacher, on real text: no image, no download, the same road."""
