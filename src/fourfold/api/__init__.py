"""The OpenAI-compatible HTTP edge: schemas, routes, streaming, auth, limits, metrics.

Importing this package costs nothing: FastAPI and uvicorn come with `fourfold.api.app` and
`fourfold.api.server`, the options of both with `fourfold.api.config`.
"""
