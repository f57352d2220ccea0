"""What comes in: lists of URLs and captions, downloads, tars, images."""
