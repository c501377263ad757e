"""gRPC between routers and the engine: messages, conversion, server, client."""
