"""The wire contract: .proto files, their generated stubs, and the conversion to domain values."""
