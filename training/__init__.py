"""What every stage is built with: settings, run folders, schedules, losses, devices, pictures, plots, extraction."""
