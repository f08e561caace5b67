"""What knows nothing of this project and serves every room: errors, console, atomic files, leases, launch, Hub."""
