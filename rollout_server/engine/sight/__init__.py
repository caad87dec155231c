"""What a model sees: where pictures stand among tokens, what a tower made of them, and how rows turn behind them."""
