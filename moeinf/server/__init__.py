"""An HTTP server with OpenAI's interface over one loaded model, for `moeinf serve`.

    connection --protocol.py--> edge.py --> app.py --requests.py--> scheduler.py --> generation.py
                slow, broken    who asks,   routes   what is asked   queue, turns    tokens, text

The model runs in threads of the scheduler, and the event loop waits for none of them. A request
is a `Job`: it ends by itself, by its limit, or because its client has left.
"""
