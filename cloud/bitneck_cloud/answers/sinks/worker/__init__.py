"""The worker: a process beside the server that delivers to brokers and webhooks.

sender, in the server --RemoteSink, Link--> socket --> serving.py, in the worker: MqttSink, WebhookSink
"""
