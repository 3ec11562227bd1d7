// Shows the server's description of itself; a key typed under "Authorize" is sent along.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#api", validatorUrl: null, persistAuthorization: false });
