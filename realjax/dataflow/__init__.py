"""What an experiment is: model function calls, the graph their keys make, the roles they act on, and the run around
them.
"""
