"""The web side: TGI's and OpenAI's routes as one ASGI app. Never imports torch."""
