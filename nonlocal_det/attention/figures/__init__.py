"""Draws attention, influence and detections: images, figures, pages and videos."""
