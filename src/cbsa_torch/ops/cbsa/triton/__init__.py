"""The passes over tokens as Triton kernels. The modules here need triton, which is optional."""
