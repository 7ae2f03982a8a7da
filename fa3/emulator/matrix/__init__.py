"""Matrix units: wgmma with its descriptors, mma.sync, ldmatrix and stmatrix."""
