"""What the machine has: through NVML (`nvml`), or by playing the profile of another machine (`profile`)."""
