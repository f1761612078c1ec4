"""Running the model: devices, training, decoding, checkpoints, meshes. The lesson imports nothing from here."""
