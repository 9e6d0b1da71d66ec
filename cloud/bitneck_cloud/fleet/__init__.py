"""The devices as a fleet: rules of rates by names of clients, and what is known of clients that are gone."""
