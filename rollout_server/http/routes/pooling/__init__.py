"""Routes that read and sample nothing: classes, scores, ranks, rewards."""
