"""Data: sources on the host, arrays on the device, augmentation."""
