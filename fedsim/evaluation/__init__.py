"""Test losses, per client and global, as sums that merge exactly."""
