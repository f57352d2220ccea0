"""What shows and checks a finished store: catalog, thumbnails, report, explorer, verify, doctor."""
