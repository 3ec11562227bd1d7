"""Messages to tokens and vision spans, and their M-RoPE positions."""
