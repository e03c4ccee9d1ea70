"""Speech: waveform to token-rate embeddings (section 8)."""
