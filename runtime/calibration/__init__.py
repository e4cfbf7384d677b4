"""What a machine takes for one model, measured: engine runs, and the laws fitted to them."""
