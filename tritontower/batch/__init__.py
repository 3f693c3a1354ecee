"""The packed batch: what preprocessing hands to the engine."""
